"""Policies: one document that composes layers, budgets and presets (docs/policy.md).

``model`` is what a policy says, ``reading`` gets there from what a user wrote, and
``composition`` turns it into what the engine does. Only the standard library, no engine.
"""
