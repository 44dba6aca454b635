"""Where reports lie: written atomically, indexed, shrunk in a storm, pruned."""

from __future__ import annotations

from crumplezone.reports.store.store import Store as Store
