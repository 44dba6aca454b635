"""Inference: batches, the native and safe rungs, the ladder, and `Decoder`."""
