"""The rounds that serve people, replayed with an oracle on data whose boxes are known."""
