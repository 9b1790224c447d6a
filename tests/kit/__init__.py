"""What the tests share: odd inputs, comparisons with reasons, op checks, compile gates."""
