"""Judges of replies: mathematics (`math`), multiple choice (`choice`), structured output (`structured`).

Pure functions of a text and a gold value. Each returns a `Grade` for any text, in bounded time.
"""
