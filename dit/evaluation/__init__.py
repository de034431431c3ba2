"""How good a model's images are: Fréchet distance, precision and recall, and whether scenes show what their captions say."""
