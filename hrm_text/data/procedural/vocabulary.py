"""The names, places and things that passages, questions and stories speak of."""

from __future__ import annotations


def words(text: str) -> tuple[str, ...]:
    """The words of a text, for tables that are easier to read and mend without quotes."""
    return tuple(text.split())


NAMES = words(
    "Ada Ben Clara David Elena Felix Grace Hugo Iris Jonas Kira Leo Mara Nils Olga Paul Rosa Simon Tara Viktor "
    "Wanda Yusuf Zoe Amir Bella Carlos Dora Emil Fatima Georg"
)
TOWNS = words(
    "Oslo Rome Lima Cairo Delhi Paris Quito Seoul Tokyo Vienna Dublin Lisbon Madrid Prague Athens Berlin Boston "
    "Geneva Havana Nairobi"
)
JOBS = words("baker nurse pilot farmer painter teacher lawyer tailor sailor singer writer dentist miner cook judge")
COLOURS = words("red blue green black white yellow brown grey pink purple")
PETS = words("cat dog horse rabbit parrot goat turtle hamster pony duck")
FOODS = words("soup bread rice pasta cheese fish salad curry pizza stew")
SPORTS = words("tennis chess football rowing golf hockey boxing skiing judo sailing")
THINGS = words("coin key pen cup book lamp ring stone shell stamp button candle ticket map bell")
PLACES = words("kitchen garden garage office attic cellar hall bedroom library park")

CATEGORIES: dict[str, tuple[str, ...]] = {
    "a fruit": words("apple pear plum cherry grape lemon mango peach banana melon fig apricot"),
    "a tool": words("hammer saw drill wrench chisel axe screwdriver pliers shovel rake file spade"),
    "an animal": words("lion tiger wolf bear fox deer eagle whale shark snake otter camel"),
    "a vehicle": words("car bus train truck bicycle tram lorry ferry canoe tractor van taxi"),
    "a colour": words("red blue green yellow purple brown pink grey black white violet scarlet"),
    "a metal": words("iron gold silver copper tin lead zinc nickel steel bronze platinum brass"),
    "an instrument": words("piano violin flute drum harp guitar trumpet cello organ banjo oboe tuba"),
    "a piece of clothing": words("shirt coat hat scarf sock glove skirt jacket dress belt sweater trousers"),
    "a tree": words("oak pine birch maple willow cedar elm beech poplar spruce larch yew"),
    "a vegetable": words("carrot onion potato cabbage spinach leek turnip radish lettuce celery garlic pea"),
    "a piece of furniture": words("table chair sofa desk bed shelf cupboard stool bench wardrobe dresser couch"),
    "a part of the body": words("arm leg hand foot knee elbow neck shoulder ear nose chin wrist"),
}
"""Each kind of thing with twelve of its members; none belongs to two kinds."""
