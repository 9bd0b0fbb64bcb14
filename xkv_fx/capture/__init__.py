"""From a model to its captured graphs, checked against the model's own logits."""
