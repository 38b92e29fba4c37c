"""What `train_cifar.py` stands on: its data, its complaints, its output folder.

Needs the extra `train`; nothing else in `bcn_flax` imports it.
"""
