"""The judge of the digits gate: a classifier of real digits and 1,000 held-out real digits."""
