"""Evaluation scripts, one per question, run from a checkout as `python -m eval.NAME`.

compare       how do a DLCM and its baseline compare?
generate      what does a model say?
segmentation  where does a DLCM cut a text into concepts? (viewer: on a page)
analysis      where do its loss and its boundaries lie?
perplexity    how well does it predict text?
questions     how well does it answer? (benchmarks: by lm-eval)
flops         what does it cost?
"""
