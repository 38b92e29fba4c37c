"""What `train_cifar.py`, its only user, is built on. Not part of the installed package."""
