"""What captions are worth: each metric, and how sure its figures are."""
