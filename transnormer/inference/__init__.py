"""Generation with a state of fixed size: constant time and memory per token."""
