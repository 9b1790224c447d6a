"""One module a word; ``registry.load`` imports them all."""
