"""Questions with short answers, in our own words: what the real model learns its form from. Standard library only.

`training()` and `held_out()` share no question. An answer's confidence is part of the lesson: high for facts and arithmetic,
medium for estimates and advice, low for what nobody can know from the question alone.
"""

from __future__ import annotations

import calendar
import random
from collections.abc import Iterator

Answered = tuple[str, str, str]  # question, answer, confidence

_CAPITALS = """
Japan Tokyo, Kenya Nairobi, Norway Oslo, Peru Lima, Egypt Cairo, Greece Athens, Cuba Havana, Iran Tehran,
Austria Vienna, Ireland Dublin, Portugal Lisbon, Poland Warsaw, Hungary Budapest, Finland Helsinki, Sweden
Stockholm, Denmark Copenhagen, Chile Santiago, Canada Ottawa, China Beijing, Russia Moscow, Thailand Bangkok,
Vietnam Hanoi, Turkey Ankara, Ghana Accra, Senegal Dakar, Iceland Reykjavik, Belgium Brussels, Romania
Bucharest, Bulgaria Sofia, Nepal Kathmandu, Iraq Baghdad, Syria Damascus, Lebanon Beirut, Qatar Doha
"""
_SYMBOLS = """
hydrogen H, helium He, carbon C, nitrogen N, sodium Na, magnesium Mg, silicon Si, sulfur S, chlorine Cl,
potassium K, calcium Ca, iron Fe, copper Cu, zinc Zn, silver Ag, tin Sn, lead Pb, mercury Hg
"""
_OPPOSITES = """
hot cold, big small, fast slow, open closed, early late, rich poor, happy sad, light dark, wet dry, full
empty, strong weak, young old, high low, loud quiet, hard soft, sweet bitter, clean dirty, deep shallow, wide
narrow, thick thin
"""
_YOUNG = """
dog puppy, cat kitten, cow calf, horse foal, sheep lamb, goat kid, pig piglet, duck duckling, bear cub, frog
tadpole, swan cygnet, kangaroo joey, eagle eaglet, deer fawn, hen chick
"""
_LEGS = "a dog 4, a hen 2, an ant 6, a crab 10, a horse 4, a bee 6, a scorpion 8, a snake 0, a beetle 6, a person 2"
_COLOURS = """
a ripe tomato red, fresh snow white, grass green, coal black, an emerald green, a flamingo pink, a carrot
orange, milk white, a raven black, the sun at noon yellow, a ruby red, a school chalkboard black
"""
_PLURALS = """
mouse mice, child children, foot feet, tooth teeth, goose geese, leaf leaves, man men, city cities, knife knives, box boxes
"""

_GENERAL = """
What do bees make?|Bees make honey.|high
What is frozen water called?|Frozen water is called ice.|high
Which planet do we live on?|We live on Earth.|high
What do plants need to grow?|Plants need light, water and air.|high
Who wrote the play Hamlet?|William Shakespeare wrote Hamlet.|high
What is the largest ocean?|The Pacific is the largest ocean.|high
Which gas do people breathe to live?|People need oxygen.|high
How many minutes are in an hour?|An hour has 60 minutes.|high
How many centimetres are in a metre?|A metre has 100 centimetres.|high
What instrument has black and white keys?|A piano has black and white keys.|high
What is a baker's work?|A baker makes bread and cakes.|high
Why does ice float?|Ice floats because it is less dense than water.|high
Why do leaves fall in autumn?|Trees drop leaves to save water in winter.|high
What causes the tides?|The pull of the Moon causes the tides.|high
What is a noun?|A noun is a word for a thing, a person or a place.|high
What is a triangle?|A triangle is a shape with three sides.|high
What does a thermometer measure?|A thermometer measures temperature.|high
Who painted the Mona Lisa?|Leonardo da Vinci painted the Mona Lisa.|high
What is a desert?|A desert is a dry place with little rain.|high
Explain what a computer is.|A computer is a machine that follows instructions.|high
Explain gravity to a child.|Gravity is the pull that brings things down to the ground.|high
Translate good morning into French.|Good morning is bonjour in French.|high
Translate thank you into Spanish.|Thank you is gracias in Spanish.|high
Name three fruits.|Three fruits are apples, pears and plums.|high
Name two rivers in Europe.|The Danube and the Rhine are rivers in Europe.|high
Name an animal that can fly.|A bat can fly.|high
Hello!|Hello! How can I help you?|high
Hi, how are you today?|I am well, thank you.|high
Good evening.|Good evening! What can I do for you?|high
Thank you very much.|You are welcome.|high
Who are you?|I am SmolLM, an AI assistant.|high
What can you do for me?|I can answer questions and help with texts.|high
Goodbye!|Goodbye! Have a good day.|high
Can you help me?|Yes, tell me what you need.|high
I feel tired.|A short rest and a glass of water may help.|medium
I have a headache. What should I do?|Rest, drink water, and see a doctor if it stays.|medium
What should I cook tonight?|A vegetable soup is quick and good.|medium
Give me a tip for learning a language.|Practise a little every day.|medium
How can I sleep better?|Go to bed at the same time every day.|medium
Which sport is best for beginners?|Walking is a good start.|medium
Suggest a name for a cat.|Pepper is a nice name for a cat.|medium
What is a good gift for a teacher?|A book or a plant is a good gift.|medium
How long does it take to learn the guitar?|It takes about a year to play simple songs.|medium
How many people live in a big city?|A big city has several million people.|medium
How tall is a grown tree?|A grown tree is about 20 metres tall.|medium
How heavy is a cat?|A cat weighs about 4 kilograms.|medium
How far can a person walk in a day?|A person can walk about 30 kilometres.|medium
How many words are in a novel?|A novel has about 90,000 words.|medium
How much does a bicycle cost?|A bicycle costs a few hundred dollars.|medium
Is coffee good for me?|A little coffee is fine for most people.|medium
Write a sentence about the sea.|The sea shone in the evening light.|medium
Write a short poem about rain.|Rain taps the roof, and the garden wakes.|medium
Tell me a fact about whales.|Whales breathe air.|high
Tell me something funny.|My plants and I both grow slowly.|medium
Write a line of Python that prints hello.|print('hello')|high
How do I open a file in Python?|Use open(name) in a with statement.|high
What will the weather be next month?|I cannot know next month's weather.|low
Who will win the next election?|I cannot know who will win.|low
What am I thinking of?|I cannot know what you are thinking of.|low
What did I eat yesterday?|I cannot know what you ate.|low
How old is my neighbour?|I cannot know your neighbour's age.|low
What is my name?|I do not know your name.|low
Where did I leave my keys?|I cannot know where your keys are.|low
Which number will I roll?|Nobody can know which number comes.|low
What is in my pocket?|I cannot see your pocket.|low
When will it snow here?|I cannot know when it will snow.|low
Will my team win on Sunday?|I cannot know the result.|low
What time is it?|I have no clock.|low
How many books are on my shelf?|I cannot see your shelf.|low
What is the price of gold tomorrow?|I cannot know tomorrow's price.|low
"""

_HELD_OUT = """
What is the capital of France?
What is the capital of Italy?
What is the capital of Spain?
What is the capital of Germany?
How many legs does a spider have?
What colour is a ripe banana?
What is the chemical symbol of gold?
What is the opposite of long?
What is a baby lion called?
What is 7 plus 6?
What is 12 minus 5?
Which month comes after March?
Who wrote Romeo and Juliet?
What is the tallest mountain on Earth?
Which animal is known as the king of the jungle?
How many days are in a week?
Why is the sky blue?
What is photosynthesis?
Explain the internet in simple words.
What is the difference between a frog and a toad?
Tell me a joke.
Hey, what's up?
Nice to meet you.
Can you recommend a good book?
What should I wear when it is cold?
How do I make a cup of tea?
Give me three tips for saving money.
Write a haiku about the moon.
Write a Python function that adds two numbers.
Translate "I love you" into Italian.
List the primary colours.
How far away is the Moon?
How long does it take to boil an egg?
What is the meaning of life?
What will I dream about tonight?
Who will win the World Cup in 2090?
What is my favourite colour?
I am bored. What can I do?
Is it going to rain in London next Friday?
Summarise the story of Cinderella in one sentence.
"""


def held_out() -> list[str]:
    """40 questions that training never sees, several of kinds that it never sees either."""
    return _HELD_OUT.strip().splitlines()


def training() -> list[Answered]:
    """Every question of training with its answer, once, in an order that is always the same."""
    asked = {question.casefold() for question in held_out()}
    rows = {row[0]: row for row in _facts() if row[0].casefold() not in asked}
    result = list(rows.values())
    random.Random(0).shuffle(result)
    return result


def _facts() -> Iterator[Answered]:
    for line in _GENERAL.strip().splitlines():
        question, answer, confidence = line.split("|")
        yield question, answer, confidence
    for name, capital in _pairs(_CAPITALS):
        yield f"What is the capital of {name}?", f"The capital of {name} is {capital}.", "high"
        yield f"Which country has the capital {capital}?", f"{capital} is the capital of {name}.", "high"
    for name, symbol in _pairs(_SYMBOLS):
        yield f"What is the chemical symbol of {name}?", f"The chemical symbol of {name} is {symbol}.", "high"
    for one, other in _pairs(_OPPOSITES):
        yield f"What is the opposite of {one}?", f"The opposite of {one} is {other}.", "high"
    for parent, young in _pairs(_YOUNG):
        yield f"What is a baby {parent} called?", f"A baby {parent} is called a {young}.", "high"
    for animal, legs in _pairs(_LEGS):
        yield f"How many legs does {animal} have?", f"{animal.capitalize()} has {legs} legs.", "high"
    for thing, colour in _pairs(_COLOURS):
        yield f"What colour is {thing}?", f"{thing.capitalize()} is {colour}.", "high"
    for one, many in _pairs(_PLURALS):
        yield f"What is the plural of {one}?", f"The plural of {one} is {many}.", "high"
    months = list(calendar.month_name)[1:]
    for month, after in zip(months, [*months[1:], months[0]], strict=True):
        yield f"Which month comes after {month}?", f"{after} comes after {month}.", "high"
    chance = random.Random(1)
    for _ in range(40):
        one, other = chance.randint(2, 20), chance.randint(2, 20)
        yield f"What is {one} plus {other}?", f"{one} plus {other} is {one + other}.", "high"
        yield f"What is {one + other} minus {one}?", f"{one + other} minus {one} is {other}.", "high"


def _pairs(table: str) -> list[tuple[str, str]]:
    """`a b, c d`: all words but the last, and the last."""
    rows = [" ".join(entry.split()).rpartition(" ") for entry in table.split(",")]
    return [(first, last) for first, _, last in rows]
