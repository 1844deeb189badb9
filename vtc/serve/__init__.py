"""`vtc serve`: many clients at once, on the continuous batching of transformers.

An image is encoded and pruned before the decoder (`encode`), once for all who send it (`memory`); a request's prompt is
a list of ids, virtual ones where visual tokens stayed (`prompt`); stock continuous batching runs those
(`engine`, the one file that uses private parts of transformers). What cannot be packed so is generated alone (`alone`).
"""
