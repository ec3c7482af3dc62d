"""Configs that run by name: ``ka2l run NAME``."""
