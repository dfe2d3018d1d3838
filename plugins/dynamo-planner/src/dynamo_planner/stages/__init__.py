"""The stages of a decision that come with the planner. `dynamo_planner.contract` says what a stage is."""
