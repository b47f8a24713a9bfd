"""What goes where: a model's rates on a machine, the seconds of a step, sizes, and the integer program."""
