"""What is wrong with this installation and what to do about it; and connecting a project by one command."""
