"""crumplezone triage: reports listed, shown, exported, run again."""
