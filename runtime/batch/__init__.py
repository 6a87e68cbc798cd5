"""Many masks: the plan of a run, its log of what is complete, several models, Ray."""
