"""Jinja templates of reports, pages and model cards."""
