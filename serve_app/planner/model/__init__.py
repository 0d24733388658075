"""A checkpoint, from its metadata alone: sizes, tensors, quantization. No weights are read."""
