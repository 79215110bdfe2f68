"""Self-compression (arXiv 2301.13142): weights that learn their own bit widths while a model trains.

    quantiser.py   the layer: bit depth and exponent of each group of weights, ternary weights, their codes
    partial.py     a layer some of whose rows and columns are not there
    removal.py     dead channels leave a model that is being trained
    compact.py     a physically smaller model without what is zero
    packing.py     the model as a packed file, and back

Training with it is `train.compression`, the command line `eval.selfcompress`.
"""
