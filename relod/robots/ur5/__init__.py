"""The UR5: the arm, its controller, its task."""
