// Where the boxes of a tree go. A row a trajectory, a column a step:
//
//   prompt --- step --- step --- leaf o      a trajectory goes straight on along its row;
//                |----- step --- leaf x      what branched off it hangs below

/** Boxes { members, parent, children, column, row }, parents first; `fold` joins runs of steps nothing branches off. */
function layOut(nodes, fold) {
  const children = nodes.map(() => 0), boxOf = [], boxes = [];
  for (const node of nodes) if (node.parent !== null) children[node.parent]++;
  nodes.forEach((node, i) => {
    const above = node.parent;
    if (fold && above && children[above] === 1 && node.round === nodes[above].round) {
      boxOf[i] = boxOf[above];
      boxes[boxOf[i]].members.push(i);
    } else {
      boxOf[i] = boxes.length;
      boxes.push({ index: boxes.length, members: [i], parent: above === null ? null : boxOf[above], children: [], column: 0, row: 0 });
    }
  });
  for (const box of boxes) {
    if (box.parent === null) continue;
    boxes[box.parent].children.push(box.index);
    box.column = boxes[box.parent].column + 1;
  }
  let rows = 0;
  for (const box of boxes) { // depth first: a first child follows its parent at once
    const above = box.parent === null ? null : boxes[box.parent];
    box.row = above && above.children[0] === box.index ? above.row : rows++;
  }
  return { boxes, boxOf, rows, columns: boxes.reduce((most, box) => Math.max(most, box.column), 0) + 1 };
}

function depthOf(nodes) {
  const depths = [];
  nodes.forEach((node, i) => { depths[i] = node.parent === null ? 1 : depths[node.parent] + 1; });
  return depths.reduce((a, b) => Math.max(a, b), 0);
}

/** The nodes from the prompt to `index`. */
function pathTo(nodes, index) {
  const path = [];
  for (let i = index; i !== null; i = nodes[i].parent) path.push(i);
  return path.reverse();
}
