// The browser of responses. Whatever a model or a data set wrote enters the page by textContent alone.
"use strict";
(() => {
  const PAGE = 40;
  const data = JSON.parse(document.getElementById("responses").textContent);
  const items = data.items;
  const get = (id) => document.getElementById(id);
  const group = (item) => data.groups[item.group];
  const MARKS = { right: "✓", partly: "◐", wrong: "✗", unreadable: "?", "no room": "∅" };
  const FINISHES = { stop: "ended by itself", length: "as long as it may be", "no room": "not asked" };

  function element(name, className, text) {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  // ------------------------------------------------------------------------------------------------ filters
  const isRight = (item) => item.kinds.includes("right");
  const otherIsRight = (item) => item.other && item.other.strict >= 1;
  const searched = (item) =>
    (item.lower ??= [data.texts[item.prompt], data.texts[item.expected], item.got, item.text, item.id, item.subject]
      .join("\n").toLowerCase());
  const fields = {
    kind: {
      choices: [["not right", "all that is not right"], ...Object.entries(data.kinds), ["", "everything"]]
        .map(([value, label]) => [value, value === "wrong" ? "wrong, but read" : label]),
      holds: (item, value) => (value === "not right" ? !isRight(item) : item.kinds.includes(value)),
    },
    task: { choices: distinct((item) => group(item).task, "all"), holds: (item, value) => group(item).task === value },
    condition: {
      choices: distinct((item) => group(item).condition, "all"),
      holds: (item, value) => group(item).condition === value,
    },
    subject: { choices: distinct((item) => item.subject, "all"), holds: (item, value) => item.subject === value },
    other: {
      choices: [["", "whatever it says"], ["right", "has it right"], ["not", "has it not"]],
      holds: (item, value) => Boolean(item.other) && otherIsRight(item) === (value === "right"),
    },
  };
  const chosen = { kind: "not right", task: "", condition: "", subject: "", other: "" };
  let words = "";

  function distinct(of, all) {
    const values = [...new Set(items.map(of))].filter(Boolean).sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
    return [["", all], ...values.map((value) => [value, value])];
  }

  function passes(item, except) {
    for (const name in fields) {
      if (name !== except && chosen[name] && !fields[name].holds(item, chosen[name])) return false;
    }
    return !words || searched(item).includes(words);
  }

  // Beside every choice stands how many responses it would leave, the other filters being as they are.
  function fill(name) {
    const rest = items.filter((item) => passes(item, name));
    const options = [];
    for (const [value, label] of fields[name].choices) {
      const count = value ? rest.filter((item) => fields[name].holds(item, value)).length : rest.length;
      if (!count && value && value !== chosen[name] && value !== "not right") continue;
      const option = element("option", "", `${label} (${count.toLocaleString("en")})`);
      option.value = value;
      option.selected = value === chosen[name];
      options.push(option);
    }
    get(name).replaceChildren(...options);
  }

  // --------------------------------------------------------------------------------------------------- list
  let matching = [];
  let at = 0;

  function filter() {
    const before = matching[at];
    matching = items.filter((item) => passes(item));
    at = Math.max(0, matching.indexOf(before));
    Object.keys(fields).forEach(fill);
    show();
  }

  function kindOf(item) {
    return item.kinds.find((kind) => kind in MARKS);
  }

  function verdictClass(item) {
    return isRight(item) ? "good" : "bad";
  }

  function row(item, number) {
    const made = element("li");
    made.id = `option-${number}`;
    made.setAttribute("role", "option");
    made.setAttribute("aria-selected", String(number === at));
    made.setAttribute("aria-posinset", String(number + 1));
    made.setAttribute("aria-setsize", String(matching.length));
    const mark = element("span", verdictClass(item), MARKS[kindOf(item)]);
    mark.title = data.kinds[kindOf(item)];
    const got = item.got || `(${data.kinds[kindOf(item)]})`;
    made.append(mark, element("div", "", isRight(item) ? got : `${got} ≠ ${data.texts[item.expected]}`));
    made.append(element("div", "where", place(item)));
    made.addEventListener("click", () => go(number));
    return made;
  }

  function place(item) {
    const sample = group(item).samples > 1 ? `sample ${item.sample + 1}` : "";
    return [group(item).task, group(item).condition, item.subject, item.id, sample].filter(Boolean).join(" · ");
  }

  function show() {
    const page = Math.floor(at / PAGE);
    const pages = Math.max(1, Math.ceil(matching.length / PAGE));
    const rows = matching.slice(page * PAGE, (page + 1) * PAGE).map((item, i) => row(item, page * PAGE + i));
    const list = get("options");
    list.replaceChildren(...(rows.length ? rows : [element("li", "none", "Nothing here is so.")]));
    if (rows.length) list.setAttribute("aria-activedescendant", `option-${at}`);
    else list.removeAttribute("aria-activedescendant");
    const selected = list.querySelector('[aria-selected="true"]');
    if (selected) {
      const top = selected.offsetTop - list.offsetTop;
      if (top < list.scrollTop) list.scrollTop = top;
      else if (top + selected.offsetHeight > list.scrollTop + list.clientHeight) {
        list.scrollTop = top + selected.offsetHeight - list.clientHeight;
      }
    }
    get("status").textContent = matching.length
      ? `${(at + 1).toLocaleString("en")} of ${matching.length.toLocaleString("en")}` : "none";
    get("page").textContent = `${page + 1} of ${pages}`;
    get("page-before").disabled = page === 0;
    get("page-after").disabled = page >= pages - 1;
    get("detail").replaceChildren(...(matching.length ? detail(matching[at]) : []));
    for (const text of get("detail").querySelectorAll("pre.question")) text.scrollTop = text.scrollHeight;
  }

  function go(number) {
    at = Math.min(Math.max(number, 0), Math.max(matching.length - 1, 0));
    show();
  }

  // ------------------------------------------------------------------------------------------------- detail
  function text(title, value, className, ifNothing) {
    const box = element("section", "box");
    const body = element("pre", className);
    if (value) body.append(...marked(value));
    else {
      body.textContent = ifNothing;
      body.classList.add("nothing");
    }
    body.dir = "auto";
    body.tabIndex = 0; // a long text is scrolled with the keyboard
    body.setAttribute("aria-label", title);
    box.append(element("h3", "", title), body);
    return box;
  }

  function marked(value) {
    const lower = value.toLowerCase();
    if (!words || lower.length !== value.length) return [document.createTextNode(value)];
    const parts = [];
    let from = 0;
    for (let hit = lower.indexOf(words); hit >= 0; hit = lower.indexOf(words, from)) {
      parts.push(document.createTextNode(value.slice(from, hit)));
      parts.push(element("mark", "", value.slice(hit, hit + words.length)));
      from = hit + words.length;
    }
    return [...parts, document.createTextNode(value.slice(from))];
  }

  function detail(item) {
    const top = element("div", "top");
    const what = element("div");
    const verdict = item.kinds.map((kind) => data.kinds[kind]).join(", ");
    what.append(element("span", `verdict ${verdictClass(item)}`, `${MARKS[kindOf(item)]} ${verdict}`));
    what.append(element("span", "faint", place(item)));
    const steps = element("div");
    for (const [label, name, by] of [["‹", "response before", -1], ["›", "response after", 1]]) {
      const button = element("button", "", label);
      button.type = "button";
      button.setAttribute("aria-label", name);
      button.disabled = !matching[at + by];
      button.addEventListener("click", () => {
        go(at + by);
        (get("detail").querySelector(`button[aria-label="${name}"]:not(:disabled)`) ?? get("options")).focus();
      });
      steps.append(button);
    }
    top.append(what, steps);
    const answers = element("div", "answers");
    answers.append(text("Expected", data.texts[item.expected], "", "(empty)"));
    answers.append(text("Read out of the response", item.got, "", "nothing could be read"));
    const made = [top, text("Prompt", data.texts[item.prompt], "question", "(empty)"), answers];
    made.push(text("Response", item.text, "", item.finish === "no room" ? "not asked: the prompt fills the context" : "(empty)"));
    if (item.other) {
      const title = `The other model’s response: ${otherIsRight(item) ? "right" : "not right"}`;
      made.push(text(title, item.other.text, "", "(empty)"));
    }
    const facts = [`${item.tokens.toLocaleString("en")} ${item.tokens === 1 ? "token" : "tokens"}`, FINISHES[item.finish] ?? item.finish];
    facts.push(`worth ${percent(item.strict)} strictly, ${percent(item.published)} as published`);
    made.push(element("p", "facts", facts.join(" · ")));
    return made;
  }

  function percent(share) {
    return `${(100 * share).toFixed(share === 0 || share === 1 ? 0 : 1)} %`;
  }

  // --------------------------------------------------------------------------------------------------- keys
  const turnPage = (by) => go((Math.floor(at / PAGE) + by) * PAGE);
  get("page-before").addEventListener("click", () => turnPage(-1));
  get("page-after").addEventListener("click", () => turnPage(1));
  for (const name in fields) {
    get(name).addEventListener("change", (event) => {
      chosen[name] = event.target.value;
      filter();
    });
  }
  get("search").addEventListener("input", (event) => {
    words = event.target.value.toLowerCase();
    filter();
  });
  get("filters").addEventListener("submit", (event) => event.preventDefault());
  get("options").addEventListener("keydown", (event) => {
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: matching.length - 1, PageDown: at + 10, PageUp: at - 10 };
    if (!(event.key in to) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    go(to[event.key]);
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target === get("search") && event.key === "Enter") get("options").focus();
    if (event.target.matches("input, select, textarea")) return;
    const seen = get("browse").getBoundingClientRect();
    if (seen.bottom < 0 || seen.top > innerHeight) return;
    const by = { ArrowRight: 1, j: 1, ArrowLeft: -1, k: -1 }[event.key];
    if (by) go(at + by);
    else if (event.key === "/") get("search").focus();
    else return;
    event.preventDefault();
  });

  for (const name of ["task", "condition", "subject"]) get(name).parentElement.hidden = fields[name].choices.length < 3;
  get("other").parentElement.hidden = !items.some((item) => item.other);
  if (!items.some((item) => !isRight(item))) chosen.kind = "";
  get("app").hidden = false;
  filter();
})();
