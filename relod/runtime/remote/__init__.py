"""Both ends of the link between a robot and its learner, and the learner itself."""
