"""The experience log: what a run has been through, in files that a run is resumed from, audited and exported."""
