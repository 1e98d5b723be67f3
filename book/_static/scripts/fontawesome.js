/* The icons come from the theme's style sheet and its web font. In place of this file the theme has the same icons again as
   a script of 1.5 MB, which every page would load. */
