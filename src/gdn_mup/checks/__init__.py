"""Proof that a model of one's own scales as it should: what its outputs and updates do as the width grows."""
