"""The iRobot Create 2: protocol, driver, simulated robot, and the task Create-Reacher."""
