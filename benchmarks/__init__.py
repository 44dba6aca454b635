"""`make bench`: what supervision costs, against what people use today; and the soaks."""
