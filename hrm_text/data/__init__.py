"""From text to packed batches: records, tokenizer, token store, sampled epochs, and the loader that feeds training."""
