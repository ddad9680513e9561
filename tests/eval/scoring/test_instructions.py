"""Every kind of instruction with responses that follow it and responses that do not."""

from __future__ import annotations

from typing import Any

import pytest

from hrm_text.contracts import UserError
from hrm_text.eval.scoring.instructions import KINDS, judge
from hrm_text.eval.scoring.instructions.judging import loose_forms
from hrm_text.eval.scoring.instructions.kinds import sentences
from hrm_text.eval.scoring.instructions.language import LANGUAGES, language_of

AT_LEAST, LESS = "at least", "less than"

CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("keywords:existence", {"keywords": ["moon", "sun"]}, ["The SUN, not moonlight."], ["The sun.", ""]),
    ("keywords:frequency", {"keyword": "tea", "frequency": 2, "relation": AT_LEAST},
     ["Tea and tea", "teapot, Tea, tea"], ["tea", "te a tea"]),
    ("keywords:frequency", {"keyword": "c++", "frequency": 2, "relation": LESS}, ["C++ and c"], ["c++ C++"]),
    ("keywords:forbidden_words", {"forbidden_words": ["cat", "a.b"]}, ["concatenate", "aXb"], ["The Cat.", "the a.b"]),
    ("keywords:letter_frequency", {"letter": "o", "let_frequency": 3, "let_relation": AT_LEAST}, ["oOo"], ["oo 0"]),
    ("keywords:letter_frequency", {"letter": "!", "let_frequency": 2, "let_relation": LESS}, ["Hi!", "Hi"], ["Hi!!"]),
    ("language:response_language", {"language": "de"}, ["Der Hund läuft durch den Wald und sucht einen Stock."],
     ["The dog runs through the wood and looks for a stick.", "12 + 3"]),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": AT_LEAST},
     ["One. Two.", "One! And two", "Wait... what?"], ["One", "Dr. J. Smith paid 3.50 at noon.", "..."]),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": LESS}, ["Only one."], ["One. Two."]),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, ["a\n***\nb", "a *** b", "***\na\n***\nb\n***"],
     ["a", "a\n\nb", "a\n***\n***\nb", "a***b***c"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": AT_LEAST}, ["one two three", "it's so"], ["a b"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": LESS}, ["one two", "- -"], ["one, two: three"]),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
     ["First.\n\nThen, on.", "First.\n\n\n\n\"Then\" on.\n", "a\nb\n\n**THEN**"],
     ["Then\n\nNow", "a\n\nThence", "a\n\nThen\n\nc", "Then"]),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[name] at [place]", "[a][b][c]"],
     ["[name]", "[name\nplace]", "(a) (b)"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["Bye.\nP.S. More", "p. s. more"],
     ["Bye", "ps", "P.P.S. x"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["Bye.\nP.P.S More", "P. P. S. m"],
     ["P.S. More"]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, ["* a\n* b", "x\n- a\n  * **b**\n***\n* * *"],
     ["* a", "* a\n* b\n* c", "**a**\n**b**", "-a\n-b"]),
    ("detectable_format:constrained_response", {}, ["My answer is yes.", "Well. My answer is maybe."],
     ["My answer is Yes.", "yes", "My answer is perhaps."]),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, ["*a* and **b**", "**a** **b** *c*"],
     ["**a**", "* a\n* b", "** ** *a*", "a * b"]),
    ("detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 2},
     ["Section 1\na\nSection 2\nb", "Section1 x Section 2 y Section 3 z"], ["Section 1\na", "section 1 section 2"]),
    ("detectable_format:json_format", {}, ['{"a": [1]}', '```json\n{"a": 1}\n```', "```\n[]\n```", ' {"a": 1}\n'],
     ["{a: 1}", 'Here: {"a": 1}', "", "[" * 100_000]),
    ("detectable_format:title", {}, ["<<Moon>>\nText", "Text <<a b>>"], ["<Moon>", "<<>>", "<< >>", "<<a\nb>>"]),
    ("combination:two_responses", {}, ["a\n******\nb", "******a******b"],
     ["a", "a******a", "a******b******c", "a***b", "a************b"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hello."}, ["Say hello.\nHello", " say HELLO. Hi"],
     ["Hello. Say hello.", "Say hello"]),
    ("startend:end_checker", {"end_phrase": "The end."}, ["So. The end.", '"So. the END."\n'],
     ["The end. Or not", "the end"]),
    ("startend:quotation", {}, ['"All of it."', '\n"a "b" c"\n'], ['"', '"Most" of it', "'All'"]),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": AT_LEAST},
     ["The NASA and I", "WELL-KNOWN FACT"], ["WELL-KNOWN fact", "Nasa Fact"]),
    ("change_case:capital_word_frequency", {"capital_frequency": 1, "capital_relation": LESS}, ["none 12"], ["ONE"]),
    ("change_case:english_capital", {}, ["THE CAT SAT ON THE MAT AND LOOKED AT THE MOON."],
     ["The CAT SAT ON THE MAT.", "DIE KATZE SASS AUF DER MATTE UND SAH DEN MOND AN."]),
    ("change_case:english_lowercase", {}, ["the cat sat on the mat and looked at the moon."],
     ["The cat sat on the mat.", "die katze saß auf der matte und sah den mond an.", "12"]),
    ("punctuation:no_comma", {}, ["None; here."], ["One, here."]),
]  # fmt: skip

NEED_LANGUAGE = {"language:response_language", "change_case:english_capital", "change_case:english_lowercase"}


def test_all_25_kinds_have_cases() -> None:
    assert len(KINDS) == 25
    assert {kind for kind, *_ in CASES} == set(KINDS)


@pytest.mark.parametrize(("kind", "arguments", "follow", "fail"), CASES, ids=[kind for kind, *_ in CASES])
def test_kinds(kind: str, arguments: dict[str, Any], follow: list[str], fail: list[str]) -> None:
    if kind in NEED_LANGUAGE:
        pytest.importorskip("py3langid")
    # As upstream's table has it: the arguments of all other kinds are there too, and None.
    padded = {"num_words": None, "language": None, **arguments}
    for response in follow:
        assert judge(response, [kind], [padded]).strict == (True,), response
    for response in fail:
        assert judge(response, [kind], [padded]).strict == (False,), response


def test_an_empty_response_follows_nothing() -> None:
    for kind, arguments, *_ in CASES:
        if kind not in NEED_LANGUAGE:
            assert judge(" \n", [kind], [arguments]) == judge("", [kind], [arguments])
            assert judge("", [kind], [arguments]).loose == (False,)


def test_loose_forgives_a_frame_and_emphasis_and_strict_does_not() -> None:
    framed = 'Sure, here it is:\n{"a": 1}\nHope that helps!'
    assert judge(framed, ["detectable_format:json_format"], [{}]).strict == (False,)
    assert judge(framed, ["detectable_format:json_format"], [{}]).loose == (True,)
    bold = "**The end.**"
    ending = ["startend:end_checker"], [{"end_phrase": "The end."}]
    assert (judge(bold, *ending).strict, judge(bold, *ending).loose) == ((False,), (True,))
    assert len(loose_forms(framed)) == 8 and loose_forms(framed)[0] == framed
    # Nothing is left without the one line: that follows no instruction, not even one that forbids.
    assert judge("a, b", ["punctuation:no_comma"], [{}]).loose == (False,)


def test_instructions_are_judged_one_by_one() -> None:
    kinds = ["punctuation:no_comma", "detectable_format:title", "keywords:existence"]
    judged = judge("Well,\n<<Moon>> and sun", kinds, [{}, {}, {"keywords": ["rain"]}])
    assert judged.strict == (False, True, False)
    assert judged.loose == (True, True, False)


def test_unknown_kinds_arguments_and_relations_are_told() -> None:
    with pytest.raises(UserError, match="unknown instruction 'no_comma'; the kinds are keywords:existence, "):
        judge("a", ["no_comma"], [{}])
    with pytest.raises(UserError, match="'punctuation:no_comma' cannot have the arguments {'n': 1}"):
        judge("a", ["punctuation:no_comma"], [{"n": 1}])
    with pytest.raises(UserError, match="found 1 instructions and arguments for 2"):
        judge("a", ["punctuation:no_comma"], [{}, {}])
    with pytest.raises(UserError, match="unknown relation 'at most'"):
        judge("a", ["length_constraints:number_words"], [{"num_words": 1, "relation": "at most"}])


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("No mark", 1),
        ("One. Two? Three!", 3),
        ("Mr. and Mrs. Hill, e.g. at 3 p.m. or 4.5 a.m. today.", 1),
        ("J. R. R. wrote it. I did.", 2),
        ("1. First thing.\n2. Second thing.", 2),
        ("It was 1999. Then 2000.", 2),
        ('"Stop!" he said. (Really.) Yes...', 4),
        ("今日は。いい天気！", 2),
        ("So it is, etc.", 1),
    ],
)
def test_sentences(text: str, count: int) -> None:
    assert sentences(text) == count


TEXTS = {
    "ar": "جلست القطة على الحصيرة ونظرت إلى القمر لوقت طويل قبل أن تعود إلى المنزل.",
    "bg": "Котката седна на килима и дълго гледа луната, преди да се прибере у дома.",
    "de": "Die Katze saß auf der Matte und schaute lange den Mond an.",
    "en": "The cat sat on the mat and looked at the moon for a long time.",
    "es": "El gato se sentó en la alfombra y miró la luna durante mucho tiempo.",
    "fa": "گربه روی حصیر نشست و پیش از رفتن به خانه مدت زیادی به ماه نگاه کرد.",
    "fi": "Kissa istui matolla ja katseli kuuta pitkään ennen kuin se lähti kotiin.",
    "fr": "Le chat s'est assis sur le tapis et a longtemps regardé la lune.",
    "gu": "બિલાડી સાદડી પર બેઠી અને ઘરે જતા પહેલા લાંબા સમય સુધી ચંદ્રને જોતી રહી.",
    "hi": "बिल्ली चटाई पर बैठी थी और घर जाने से पहले बहुत देर तक चाँद को देखती रही।",
    "it": "Il gatto si sedette sul tappeto e guardò a lungo la luna prima di tornare a casa.",
    "ja": "猫はマットの上に座り、家に帰る前に長い間月を眺めていた。",
    "ko": "고양이는 매트 위에 앉아 집에 가기 전에 오랫동안 달을 바라보았다.",
    "mr": "मांजर चटईवर बसले आणि घरी जाण्यापूर्वी बराच वेळ चंद्राकडे पाहत राहिले.",
    "ne": "बिरालो गुन्द्रीमा बस्यो र घर जानु अघि लामो समयसम्म चन्द्रमालाई हेरिरह्यो।",
    "pt": "O gato sentou-se no tapete e olhou para a lua por muito tempo antes de ir para casa.",
    "ru": "Кошка сидела на коврике и долго смотрела на луну, прежде чем пойти домой.",
    "sw": "Paka alikaa kwenye mkeka na kutazama mwezi kwa muda mrefu kabla ya kwenda nyumbani.",
    "th": "แมวนั่งบนเสื่อและมองดวงจันทร์เป็นเวลานานก่อนกลับบ้าน",
    "uk": "Кішка сиділа на килимку й довго дивилася на місяць, перш ніж піти додому.",
    "ur": "بلی چٹائی پر بیٹھی اور گھر جانے سے پہلے کافی دیر تک چاند کو دیکھتی رہی۔",
    "vi": "Con mèo ngồi trên tấm thảm và nhìn mặt trăng rất lâu trước khi về nhà.",
}


def test_languages_and_capitals_do_not_matter() -> None:
    pytest.importorskip("py3langid")
    assert {language: language_of(text) for language, text in TEXTS.items()} == {each: each for each in TEXTS}
    assert {language_of(text.upper()) for text in (TEXTS["de"], TEXTS["bg"])} == {"de", "bg"}
    assert language_of("3 + 4 = 7 ...") == ""
    assert len(LANGUAGES) == 30 and set(TEXTS) <= set(LANGUAGES)


def test_without_the_identifier_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from hrm_text.eval.scoring.instructions import language

    monkeypatch.setitem(__import__("sys").modules, "py3langid.langid", None)
    language._identify.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'hrm-text\[eval\]'"):
        language_of("word")
