"""What may be chosen by value: scores of packed blocks, rules of eviction, attention backends."""
