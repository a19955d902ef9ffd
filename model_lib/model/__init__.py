"""The captioner: its network and weights, words to numbers, and how captions are decoded.

Knows tensors and images; data sets, MLflow and the stages may not come in.
"""
