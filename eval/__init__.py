"""Evaluation scripts, one per question, run from a checkout as `python -m eval.NAME`.

compare       how do a DLCM and its baseline compare?
segmentation  where does a DLCM cut a text into concepts?
generate      what does a model say?
"""
