"""A step of AdamW and of the weights' moving average in one pass over memory."""
