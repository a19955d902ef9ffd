"""HTML pages that load nothing from elsewhere, their templates and charts.

Knows nothing of models, scores or files; callers hand it values.
"""
