"""Everything that is asked of Ray and Serve. Their private APIs are used in this package only."""
