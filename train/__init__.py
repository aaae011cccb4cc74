"""Training schemes and the loop they share; see README.md."""
