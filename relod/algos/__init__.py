"""Learning algorithms behind one interface; they know nothing of transport or processes."""
