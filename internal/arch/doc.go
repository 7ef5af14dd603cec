// Package arch holds the tests of the tree itself: who may import whom, that
// packages and what they export are documented, and that the documents name
// files, functions, commands and flags that exist. It has no code of its own.
package arch
