"""Organisms that see: classifiers of drawn shapes and of real digits."""
