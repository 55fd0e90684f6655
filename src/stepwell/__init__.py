"""Stepwell: read big pictures well and cheaply."""
