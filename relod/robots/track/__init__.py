"""The miniature rig and the task `track`: the smallest room, and the one to copy for a new robot."""
