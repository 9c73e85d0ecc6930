"""Traffic one can look at: recording a machine's bus, putting it into words, playing it again."""
