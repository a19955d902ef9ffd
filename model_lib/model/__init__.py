"""The captioner: its network and weights, words to numbers, and how captions are decoded."""
