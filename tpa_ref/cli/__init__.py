"""The two commands, and what they share: options, the machine, the steps of the work, what is printed."""
