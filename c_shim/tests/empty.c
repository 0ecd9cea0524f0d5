/* A library that has nothing but what it depends on. */
extern int nothing_here;
