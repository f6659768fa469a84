"""One room per robot; everything about it is in there."""
